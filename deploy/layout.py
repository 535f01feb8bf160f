"""The model that is to be served, and the layout that its blocks have on all nodes: read before anything is started."""

from __future__ import annotations

import dataclasses

from deploy.config import ClusterConfig, ConfigError
from deploy.widths import kv_pieces
from engine.config import EngineConfig, ModelConfig, kv_layout
from engine.errors import UnsupportedModel
from kvstore.blocks import KVLayout


def read_model(config: ClusterConfig) -> ModelConfig:
    """Raises `ConfigError` for one that cannot be served so."""
    try:
        model = ModelConfig.from_pretrained(config.model_dir)
    except (UnsupportedModel, OSError) as error:
        raise ConfigError(str(error)) from None
    layout_of(config, model)
    return model


def layout_of(config: ClusterConfig, model: ModelConfig, device: str = "cpu") -> KVLayout:
    """One layout for all nodes, whatever they run on: their blocks are to fit each other. Raises `ConfigError`."""
    try:
        layers, heads = kv_pieces(config.widths, model)
        engine = EngineConfig(config.dtype, device, config.block_size)
        return kv_layout(model, dataclasses.replace(engine, kv_layer_pieces=layers, kv_head_pieces=heads))
    except UnsupportedModel as error:
        raise ConfigError(str(error)) from None
