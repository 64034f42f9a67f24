// Command hello is the load's Go program: it starts the Go runtime and ends.
package main

func main() {}
