"""What a cache remembers, drawn: files that ``inspect`` puts into one page and the server sends as they are.

``view.js``     the drawing: the text with each token shaded, the gauge, compactions, layers and heads
``style.css``   its colours: one scale of lightness, which the colour-blind read too
``inspect``     the page of one text: all in one file
``talk``        the server's page
``files``       what is read from here, and the one file that is made of it
"""
