"""Other people's engines, each behind a narrow adapter; in-process torch stays the reference.

    from demur.engines.vllm import Engine, save

    save(demur.load("smollm2"), folder)
    with Engine(folder, python="/path/to/its/venv/bin/python") as engine:
        moments = engine.moments(prompts, sites=sites, positions=(-1,))

An engine has an environment of its own, so it runs in a process of its own: `wire` is what the two
send to each other, `programs` the closed list of what may be done to activations there.
"""
