"""The upload worker: a child process, the only one that imports mlflow."""
