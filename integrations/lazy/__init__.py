"""Lazy logits: a head returns a tensor that stands for its logits, and whatever a loss makes of them is computed fused.

``fuse`` in ``integrations/fuse.py`` is the door. ``stand_in`` has the tensors and the nodes of the autograd graph,
``operations`` what each operation becomes, ``gradient`` the symbols that flow back, ``rows`` the numbers and the
products, ``report`` what became of it all.
"""
