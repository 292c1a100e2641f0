"""Spot machines with on-demand ones to fall back on, for Ray's cluster launcher: ``provider.module``."""

import logging
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException

MARKET = "InstanceMarketOptions"
NO_ROOM = {
    "InsufficientInstanceCapacity",
    "InsufficientCapacity",
    "MaxSpotInstanceCountExceeded",
    "SpotMaxPriceTooLow",
    "UnfulfillableCapacity",
    "Unsupported",
}
"""What EC2 answers where it has no spot machine of the type, or will not give this account more of them."""

logger = logging.getLogger(__name__)


class SpotFirst(AWSNodeProvider):
    """Ray's own AWS provider, but a spot launch that EC2 refuses in every zone is made on demand at once.

    Ray 2.60 alone does not fall back. Of two node types of the same size its autoscaler takes the one of the higher
    ``priority``, and lowers only types whose machines were given and never joined (``ALLOCATION_TIMEOUT``); a launch
    that was refused (``ALLOCATION_FAILED``) it asks for again, for ever (``autoscaler/v2/instance_manager/subscribers/
    cloud_resource_monitor.py``). So the choice is made where the refusal arrives. Each launch asks for spot first.
    """

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Start ``count`` machines; spot where ``node_config`` says so and there is room, else on demand.

        Raises:
            NodeLaunchException: They cannot be had on demand either, or the request is wrong.
        """
        try:
            # Ray's method writes into tags and node_config.
            return super().create_node(dict(node_config), dict(tags), count)
        except NodeLaunchException as error:
            if MARKET not in node_config or error.category not in NO_ROOM:
                raise
            logger.warning("no spot %s (%s): on demand instead", node_config.get("InstanceType"), error.category)
        on_demand = {key: value for key, value in node_config.items() if key != MARKET}
        return super().create_node(on_demand, dict(tags), count)
