"""Training of retention gates for a frozen model of mlx-lm, also a quantised one, or one of mlx-vlm.

``blocks``      work in blocks with bounded memory
``attention``   attention whose entries fade with age, in bounded memory
``soft_size``   the soft size of a cache, in memory linear in the number of tokens
``entries``     the prompt cache of a training pass: it hands attention calls to the decayed attention
``pictures``    what a vision tower makes of pictures, once for teacher and student
``student``     the hooked base model: its full-attention and its decayed forward pass
``loss``        distillation, next-token and capacity losses
``step``        the gradient of a batch
``memory``      how long a context fits, from shapes
``engine``      model, gates and optimizer of a run, for the loop in ``mlx_kvret.training.run``
"""
