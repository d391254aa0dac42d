"""Whether an answer is right: graders that compare an answer with the reference, each verdict with its reason. Needs no torch."""
