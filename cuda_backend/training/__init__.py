"""Training of retention gates for a frozen transformers model.

``attention``   attention whose entries fade with age, in bounded memory
``registry``    the same in transformers' registries
``student``     the hooked base model: its full-attention and its fading forward pass
``loss``        distillation, next-token and capacity losses
``base``        loading the base model, and what fits in memory
``state``       checkpoints of a run
``processes``   one process, or several through accelerate
``loop``        the training loop
``profile``     what the trained gates retain, by layer, head and position
"""
