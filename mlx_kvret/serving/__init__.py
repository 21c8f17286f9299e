"""An OpenAI-compatible server whose memory is bounded: ``mlx-kvret serve``.

``requests``   what a client may ask, checked field by field (pydantic)
``prompts``    messages to token ids, and the places in them where a snapshot is worth keeping
``scheduler``  who waits, who reads, who decodes: plain Python on an engine, without threads
``engine``     rows that decode together; one after the other here, in one pass in ``batched``
``prefixes``   snapshots by the hash of what they have read, in memory and on ``disk``
``worker``     the one thread that owns model and caches
``app``        HTTP: routes, ``guard`` in front of them, ``replies`` in OpenAI's shape

Each backend is behind the few calls of ``backend`` (``on_mlx``, ``on_torch``).
"""
