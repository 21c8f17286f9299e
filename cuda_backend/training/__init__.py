"""Training of retention gates for a frozen transformers model.

``attention``   attention whose entries fade with age, in bounded memory
``registry``    the same in transformers' registries
``pictures``    what a vision tower makes of pictures, once for teacher and student
``student``     the hooked base model: its full-attention and its decayed forward pass
``loss``        distillation, next-token and capacity losses
``base``        loading the base model, and what fits in memory
``processes``   one process, or several through accelerate
``sharding``    a base of which each of several processes holds a share
``engine``      model, gates and optimizer of a run, for the loop in ``mlx_kvret.training.run``
"""
