"""Headstart as the prefill node of an unmodified vLLM. See HeadstartConnector in headstart_vllm.connector."""

from headstart_vllm.provenance import cache_salt

__all__ = ["cache_salt", "register"]

_NAME = "HeadstartConnector"


def register() -> None:
    """Makes the connector's name known to vLLM; its entry point "vllm.general_plugins". vLLM calls it in each of its processes,
    in some more than once."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    try:
        KVConnectorFactory.get_connector_class_by_name(_NAME)
    except ValueError:
        KVConnectorFactory.register_connector(_NAME, "headstart_vllm.connector", _NAME)
