"""Worker processes of `data.Loader`: they never touch MPI, and end with their rank."""
