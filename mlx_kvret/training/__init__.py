"""What training gates needs on every backend, with numpy alone; the MLX part is in the folder ``on_mlx``.

``config``    validated settings of a run
``records``   text files, JSON lines and data sets as numbered records
``documents`` records as tokens, with the tokens to learn from
``packing``   batches of packed documents, from a position that can be saved
``schedule``  the learning rate
``run``       the run itself, given a backend's engine
``state``     checkpoints of a run
``memory``    whether a step fits
``log``       the CSV log
``report``    progress bar and log lines of a run
``profile``   what the trained gates retain, by layer, head and position
``plots``     the page of plots at the end
"""
