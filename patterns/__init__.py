"""Recognising packed int4 weights in a graph: anchors, cones and what each cone means."""
