"""Reasoners: one bidirectional looped layer that solves a task whose needed depth varies from row to row.

A task (:mod:`haltkit.models.reasoner.task`) is a folder with one function that says what a sequence is made of and
draws batches; model, training, checkpoint and measurement are here and the same for all.
"""
