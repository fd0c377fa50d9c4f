"""Transformers as immutable Flax NNX pytrees: configuration, layers, loading and saving."""

from dyninf.models.checkpoint import save as save
from dyninf.models.config import ModelConfig as ModelConfig
from dyninf.models.config import RopeScaling as RopeScaling
from dyninf.models.convert import save_hf as save_hf
from dyninf.models.layers import DecoderLayer as DecoderLayer
from dyninf.models.loading import available as available
from dyninf.models.loading import load as load
from dyninf.models.loading import load_tokenizer as load_tokenizer
from dyninf.models.stacked import StackedLayers as StackedLayers
from dyninf.models.stacked import list_layers as list_layers
from dyninf.models.stacked import stack_for_decoding as stack_for_decoding
from dyninf.models.transformer import Transformer as Transformer
from dyninf.models.transformer import stack_layers as stack_layers
from dyninf.models.transformer import unstack_layers as unstack_layers
