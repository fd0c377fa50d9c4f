"""Depth policies: which layers a token runs."""

from dyninf.depth.base import EXIT as EXIT
from dyninf.depth.base import RUN as RUN
from dyninf.depth.base import SKIP as SKIP
from dyninf.depth.base import DepthPolicy as DepthPolicy
from dyninf.depth.base import LayerObs as LayerObs
from dyninf.depth.base import RunAll as RunAll
from dyninf.depth.combinators import DecayingThreshold as DecayingThreshold
from dyninf.depth.combinators import FirstOf as FirstOf
from dyninf.depth.combinators import Restricted as Restricted
from dyninf.depth.combinators import after_layer as after_layer
from dyninf.depth.combinators import at_layers as at_layers
from dyninf.depth.combinators import every as every
from dyninf.depth.combinators import first_of as first_of
from dyninf.depth.decay import DepthDecay as DepthDecay
from dyninf.depth.exits import Confidence as Confidence
from dyninf.depth.exits import Patience as Patience
from dyninf.depth.exits import Saturation as Saturation
from dyninf.depth.influence import block_influence as block_influence
from dyninf.depth.influence import least_influential as least_influential
from dyninf.depth.static import ExitAt as ExitAt
from dyninf.depth.static import SkipLayers as SkipLayers
from dyninf.depth.static import UnifiedSkip as UnifiedSkip
