"""The kinds of cases, a file each."""

from tests.fuzz.case import Kind
from tests.fuzz.kinds.checkpoints import CHECKPOINTS
from tests.fuzz.kinds.data_parallel import DATA_PARALLEL
from tests.fuzz.kinds.decoder import DECODER
from tests.fuzz.kinds.generation import GENERATION
from tests.fuzz.kinds.hugging_face import HUGGING_FACE
from tests.fuzz.kinds.in_place import IN_PLACE
from tests.fuzz.kinds.layers import LAYERS
from tests.fuzz.kinds.pipeline import PIPELINE
from tests.fuzz.kinds.pretended import PRETENDED

_ALL = (
    DECODER,
    GENERATION,
    PIPELINE,
    DATA_PARALLEL,
    IN_PLACE,
    HUGGING_FACE,
    CHECKPOINTS,
    LAYERS,
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}
RUNNABLE = {**KINDS, PRETENDED.name: PRETENDED}
