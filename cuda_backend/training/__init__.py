"""Training of retention gates for a frozen transformers model.

``attention``   attention whose entries fade with age, in bounded memory
``registry``    the same in transformers' registries
``student``     the hooked base model: its full-attention and its decayed forward pass
``loss``        distillation, next-token and capacity losses
``base``        loading the base model, and what fits in memory
``processes``   one process, or several through accelerate
``engine``      model, gates and optimizer of a run, for the loop in ``mlx_kvret.training.run``
"""
