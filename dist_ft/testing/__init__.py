"""What tests of this project, and of methods and tasks added to it, start from."""
