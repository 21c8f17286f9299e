"""What the real model can do within a budget, ability by ability; run by ``examples/real_abilities.py``."""
