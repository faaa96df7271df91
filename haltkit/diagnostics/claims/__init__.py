"""The claims of two papers, each with the quantity that tests it and the rule that judges it.

[P] is "Two-Scale Latent Dynamics for Recurrent-Depth Transformers" (arXiv 2509.23314), [M] "A Mechanistic Analysis of
Looped Reasoning Language Models" (arXiv 2604.11791). Rules and their limits stand here, written down before any model
is looked at, and a claim is judged from the results alone (:func:`judge`), so a table can be made again from its JSON.

A claim that a model of this kind or size cannot speak to is *cannot tell at this scale*, with the reason. What an
untrained model of the same shape does stands beside each value: a finding that it shares is not training's.
"""

from haltkit.diagnostics.claims.judging import CLAIMS, claims_by_model, claims_table, judge
from haltkit.diagnostics.claims.rules import Answer, Claim

__all__ = ["CLAIMS", "Answer", "Claim", "claims_by_model", "claims_table", "judge"]
