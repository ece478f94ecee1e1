"""The workflow spec: sections, knobs, errors."""

from cluster.spec.errors import SpecSource, leaf_paths, parse_yaml
from cluster.spec.knobs import MEANINGS, Knob, knob_named
from cluster.spec.sections import NUM_RELEASES, WorkflowSection, is_pinned
from cluster.spec.spec import (
    MAX_ROLLBACK_S,
    ModelSection,
    WorkflowSpec,
    charter_answers,
    load_spec,
    override,
    parse_spec,
    spec_to_yaml,
)
