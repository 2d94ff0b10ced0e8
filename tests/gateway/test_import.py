"""The library works without the packages of the gateway, and the gateway says how to install them."""

import subprocess
import sys

PACKAGES = ("httptools", "uvloop", "grpc", "prometheus_client")
BLOCK = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {PACKAGES} else find(name, *rest)
sys.modules.update(dict.fromkeys({PACKAGES}))  # importing one of them fails
"""


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", BLOCK + code, *arguments], capture_output=True, text=True, check=False)


def test_the_library_needs_none_of_them():
    done = run("import superserve_jax as ss, superserve_jax.serving\nassert ss.Server and ss.ServerClosedError")
    assert done.returncode == 0, done.stderr


def test_the_gateway_names_the_command():
    done = run("from superserve_jax.gateway import Gateway")
    assert "the gateway needs the package 'httptools': pip install 'superserve-jax[serve]'" in done.stderr
    done = run(
        "try: from superserve_jax.gateway import Gateway\nexcept ImportError as e: print(type(e).__mro__[1].__name__)",
    )
    assert done.stdout.strip() == "SuperServeError"
