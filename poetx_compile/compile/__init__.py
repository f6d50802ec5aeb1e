"""From Dynamo's graph through the passes to compiled code."""
