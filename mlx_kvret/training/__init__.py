"""What training gates needs on every backend, with numpy alone.

``config``    validated settings of a run
``errors``    what can go wrong
``records``   text files, JSON lines and data sets as numbered records
``documents`` records as tokens, with the tokens to learn from
``packing``   batches of packed documents, from a position that can be saved
``schedule``  the learning rate
``log``       the CSV log
``report``    progress bar and log lines of a run
``plots``     the page of plots at the end
"""
