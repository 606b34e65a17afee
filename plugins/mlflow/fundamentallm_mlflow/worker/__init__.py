"""The upload worker: a child process that imports mlflow. The command ``ui`` uses ``client``."""
