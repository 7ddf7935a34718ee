"""Judges of answers, behind one small protocol: keyword lists, sequence classifiers, generative safety models, models behind an
endpoint.
"""

from nestpatch.evaluation.judges.keywords import REFUSAL_PHRASES, is_refusal, matches
from nestpatch.evaluation.judges.protocol import Judge, Verdict

__all__ = ["REFUSAL_PHRASES", "Judge", "Verdict", "is_refusal", "matches"]
