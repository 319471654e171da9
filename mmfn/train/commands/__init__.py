"""What each command of the command line does; `mmfn.cli` reads its arguments and says its errors."""
