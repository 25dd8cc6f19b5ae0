"""One call of step(): what it finds, the refreshes it decides on, the updates of all matrices."""
