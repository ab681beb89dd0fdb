"""What `training.pretrain` is made of: views of photographs, student and teacher, and the state of a run."""
