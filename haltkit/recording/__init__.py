"""Recording a loop's states, and judging recordings."""
