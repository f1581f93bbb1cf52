"""A Ray cluster of two simulated nodes: `python two_nodes.py` prints its address and holds it until stdin is closed.

Node a has the custom resource `a`, node b `b`. For each line on stdin it prints the resources that are free. Ray reads
its environment when it is imported; so whoever starts this sets it, RAY_AUTH_MODE included.
"""

import json
import logging
import sys

import ray
from ray.cluster_utils import Cluster

MEMORY = 80 * 1024 * 1024


def main() -> None:
    cluster = Cluster()
    for name in ("a", "b"):
        cluster.add_node(num_cpus=4, num_gpus=0, resources={name: 1}, object_store_memory=MEMORY)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    for _ in sys.stdin:
        print(json.dumps(ray.available_resources()), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
