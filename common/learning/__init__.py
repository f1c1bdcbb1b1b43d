"""From a study to what runs in each round: a TFF learning process, its MapReduceForm, in-process TensorFlow graphs."""
