"""superserve-jax: train one weight-shared SuperNet, and serve any of its subnets in place, so that bursts meet deadlines.

SuperServe (Khare et al., NSDI 2025) in JAX and Flax:

    import superserve_jax as ss

    run = ss.train(config, "runs/mine")             # a SuperNet from a config
    model = ss.load("runs/mine/export")             # an export
    logits = model(images, model.subnets[-1])       # any calibrated subnet
    with ss.Server(model, slo_ms=36) as server:     # SlackFit over precompiled executables
        reply = server.submit(images[0]).result()

The public names are listed in `__init__.pyi`. Each one is imported at its first use. So `import superserve_jax` itself does
not load jax.
"""

import time

import lazy_loader

__version__ = "0.1.0"
IMPORTED_NS = time.time_ns()  # a source file that is newer may not be the loaded code (see engines.keys)

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
