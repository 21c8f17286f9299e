"""The retention policy, numpy only: it is the specification and the oracle of every backend.

``retention``   log-space scores of entries from their log β and age
``policies``    baselines that need no gates, as scores of the same shape
``eviction``    which entries are kept: budget, scope, protection, ties
``config``      validated configuration of gates and of eviction
``checkpoint``  the shared gate checkpoint (safetensors + json)
``snapshot``    a saved cache that every backend opens
``budget``      budgets as memory: parsing "256MB", bytes of a cache
"""
