// Package pki is the collector's own certificate authority: the certificates
// by which collector and agents know each other when nobody else provides them.
//
// An Authority lives in a directory, or in another Storage. Its certificate is good for a year; 60
// days before the end its successor is made and handed out beside it, 30 days
// before the end the successor takes over, and the old one stays trusted until
// it expires. So whoever renews an agent's certificate at least every 30 days
// (the longest it can be good for) never meets a collector it cannot trust.
//
// Files, in a directory written whole or not at all (a temporary file is renamed):
//
//	ca.pem        certificate and key that sign, mode 0600
//	next.pem      the same of the successor, while there is one
//	previous.crt  the certificate that ca.pem followed
//	ca.crt        the bundle to trust: all certificates above
//
// The server's own certificate is good for 24 hours, is made anew at two
// thirds of that while handshakes go on, and its key is never on disk.
//
// A node's name is in the URI spiffe://procession/node/<name> of its
// certificate. Keys are ECDSA P-256. Certificates begin an hour before they
// are made, for clocks that differ.
package pki
