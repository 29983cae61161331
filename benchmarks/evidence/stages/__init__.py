"""Success on every task after every stage of training: the matrix and its measures, its files, its picture."""
