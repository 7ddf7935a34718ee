"""The health of a deployed, patched model: `diagnosis.doctor` is the way in. Nothing here writes beside a model."""
