"""What the launcher puts on ``PYTHONPATH``, so that Python processes which its script starts are patched too."""
