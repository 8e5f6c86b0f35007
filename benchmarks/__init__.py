"""The race: every claim about time, memory and accuracy, measured against what a user would pick instead.

``python -m benchmarks --help`` lists the commands. Cases, batches and competitors are data: a new one is one entry in
``cases.py`` or ``providers.py``.
"""
