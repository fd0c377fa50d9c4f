"""Transformers as immutable Flax NNX pytrees: configuration, layers, loading and saving."""

from dyninf.models.checkpoint import save as save
from dyninf.models.config import ModelConfig as ModelConfig
from dyninf.models.config import RopeScaling as RopeScaling
from dyninf.models.convert import save_hf as save_hf
from dyninf.models.layers import DecoderLayer as DecoderLayer
from dyninf.models.loading import available as available
from dyninf.models.loading import load as load
from dyninf.models.loading import load_tokenizer as load_tokenizer
from dyninf.models.mesh_model import MeshModel as MeshModel
from dyninf.models.mesh_model import on_mesh as on_mesh
from dyninf.models.meshes import make_mesh as make_mesh
from dyninf.models.meshes import parse_mesh as parse_mesh
from dyninf.models.random_weights import random_model as random_model
from dyninf.models.sharding import cache_shardings as cache_shardings
from dyninf.models.sharding import model_shardings as model_shardings
from dyninf.models.sharding import place as place
from dyninf.models.sharding import token_sharding as token_sharding
from dyninf.models.stacked import StackedLayers as StackedLayers
from dyninf.models.stacked import list_layers as list_layers
from dyninf.models.stacked import stack_for_decoding as stack_for_decoding
from dyninf.models.transformer import Transformer as Transformer
from dyninf.models.transformer import stack_layers as stack_layers
from dyninf.models.transformer import unstack_layers as unstack_layers
