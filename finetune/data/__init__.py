"""Rows -> messages -> tokens + loss mask -> a mix to train on."""
