"""Wait until a Ray cluster has so many nodes: wait_for_nodes.py NODES ADDRESS [SECONDS, default 600]."""

import logging
import sys
import time

import ray


def main(nodes: int, address: str, seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    found = "no answer"
    while time.monotonic() < deadline:
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except ray.exceptions.AuthenticationError as error:
            sys.exit(f"{address}: {error}")
        except ConnectionError as error:  # the head is still starting
            found = str(error).strip().splitlines()[0]
        else:
            alive = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
            ray.shutdown()
            if len(alive) >= nodes:
                print(f"{len(alive)} nodes: {', '.join(alive)}")
                return
            found = f"only {', '.join(alive)}"
        time.sleep(2)
    sys.exit(f"no {nodes} Ray nodes at {address} within {seconds:.0f} s: {found}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], *map(float, sys.argv[3:]))
