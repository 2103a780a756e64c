"""What a run learns from its batches: one file per objective, behind one interface."""
