// Empty: the compiler takes declarations without a body, as in gather_linux.go, only in a package with assembly.
