package pki

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"sync"
	"time"
)

// Times of a certificate authority, see the package comment.
const (
	caLife      = 365 * 24 * time.Hour
	caAnnounce  = 60 * 24 * time.Hour // before the end: the successor is made
	caHandOver  = 30 * 24 * time.Hour // before the end: the successor signs
	backdate    = time.Hour
	refreshWait = time.Hour // between two looks at the files
)

// File names.
const (
	caFile       = "ca.pem"
	nextFile     = "next.pem"
	previousFile = "previous.crt"
	bundleFile   = BundleFile
)

// An Authority signs certificates. Several processes may open one storage.
type Authority struct {
	storage Storage
	now     func() time.Time

	mu        sync.Mutex
	watched   bool // Run looks at the files, handshakes need not
	refreshed time.Time
	ca        *signer
	next      *signer             // nil while there is none
	trusted   []*x509.Certificate // ca, next, previous; those not expired
	server    *serverCert
}

// A signer is a certificate with its key.
type signer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// A FileError names a file that cannot be used, and what to do.
type FileError struct {
	Path string
	Err  error
	Do   string
}

func (e *FileError) Error() string { return fmt.Sprintf("%s: %v; %s", e.Path, e.Err, e.Do) }
func (e *FileError) Unwrap() error { return e.Err }

const (
	doRestore = "restore it from a backup, or remove the whole directory: a new authority is made then, and every agent needs a new certificate (collector issue)"
	doClock   = "set the clock, or wait"
)

// Open reads the authority in dir, or makes one if there is none.
func Open(dir string) (*Authority, error) { return open(dir, time.Now) }

func open(dir string, now func() time.Time) (*Authority, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of the certificate authority: %w", err)
	}
	return openStorage(folder(dir), now)
}

// OpenStorage is Open for files that are not in a directory.
func OpenStorage(s Storage) (*Authority, error) { return openStorage(s, time.Now) }

func openStorage(s Storage, now func() time.Time) (*Authority, error) {
	a := &Authority{storage: s, now: now}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a, a.refreshLocked(now())
}

// Run looks at the files every so often until ctx ends, so that no handshake
// has to, and what somebody did to the bundle is put right. failed is told why
// a look did not succeed; what is in memory stays in use.
func (a *Authority) Run(ctx context.Context, every time.Duration, failed func(error)) {
	a.mu.Lock()
	a.watched = true
	a.mu.Unlock()
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			a.mu.Lock()
			a.watched = false
			a.mu.Unlock()
			return
		case <-t.C:
		}
		if err := a.Refresh(); err != nil {
			failed(err)
		}
	}
}

// Refresh looks at the files now, and makes what is missing or due.
func (a *Authority) Refresh() error {
	// Not under the lock: a storage may be slow, and handshakes go on.
	next := &Authority{storage: a.storage, now: a.now}
	if err := next.refreshLocked(a.now()); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ca, a.next, a.trusted, a.refreshed = next.ca, next.next, next.trusted, next.refreshed
	return nil
}

// Bundle is the certificates agents have to trust, in PEM.
func (a *Authority) Bundle() ([]byte, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.freshLocked(a.now()); err != nil {
		return nil, err
	}
	return a.bundleLocked(), nil
}

func (a *Authority) bundleLocked() []byte { return bundleOf(a.trusted) }

func bundleOf(trusted []*x509.Certificate) (b []byte) {
	for _, c := range trusted {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return b
}

// freshLocked looks at the files if the last look is long ago.
func (a *Authority) freshLocked(now time.Time) error {
	if d := now.Sub(a.refreshed); a.watched || d >= 0 && d < refreshWait {
		return nil
	}
	return a.refreshLocked(now)
}

// conflicts is how often in a row others may have been quicker.
const conflicts = 8

// refreshLocked reads the files, and makes what is missing or due.
func (a *Authority) refreshLocked(now time.Time) (err error) {
	for range conflicts {
		if err = a.tryRefreshLocked(now); !errors.Is(err, ErrConflict) {
			return err
		}
	}
	return err
}

func (a *Authority) tryRefreshLocked(now time.Time) error {
	f, err := a.storage.Begin()
	if err != nil {
		return err
	}
	defer f.Close()
	ca, next, previous, err := readAll(f, now)
	if err != nil {
		return err
	}
	left := ca.cert.NotAfter.Sub(now)
	if next == nil && left < caAnnounce {
		if next, err = makeSigner(f, nextFile, now); err != nil {
			return err
		}
	}
	if next != nil && left < caHandOver {
		known := now.Sub(next.cert.NotBefore.Add(backdate))
		// A collector that was off for long hands over as soon as agents could
		// have learned of the successor, or when there is nothing to lose.
		if known >= caAnnounce-caHandOver || left <= 0 {
			if err := handOver(f, ca, next); err != nil {
				return err
			}
			previous, ca, next = ca.cert, next, nil
		}
	}
	var trusted []*x509.Certificate
	for _, c := range []*x509.Certificate{ca.cert, next.certificate(), previous} {
		if c != nil && (now.Before(c.NotAfter) || c == ca.cert) {
			trusted = append(trusted, c)
		}
	}
	bundle := bundleOf(trusted)
	if have, _ := f.Read(bundleFile); string(have) != string(bundle) {
		if err := f.Write(bundleFile, bundle); err != nil {
			return err
		}
	}
	if err := f.Commit(); err != nil {
		return err
	}
	a.ca, a.next, a.trusted, a.refreshed = ca, next, trusted, now
	return nil
}

// readAll reads the authority, or makes one if there is none.
func readAll(f Files, now time.Time) (ca, next *signer, previous *x509.Certificate, err error) {
	ca, err = readSigner(f, caFile)
	if errors.Is(err, fs.ErrNotExist) {
		// ca.crt is written last. With it there, the key was lost, and to make
		// a new one silently would lock out every agent.
		if _, berr := f.Read(bundleFile); berr == nil {
			return nil, nil, nil, &FileError{f.Path(caFile), errors.New("missing, but " + bundleFile + " is there"), doRestore}
		}
		ca, err = makeSigner(f, caFile, now)
	}
	if err != nil {
		return nil, nil, nil, err
	}
	if now.Before(ca.cert.NotBefore) {
		return nil, nil, nil, &FileError{f.Path(caFile), fmt.Errorf("is not valid before %s, and the clock says %s",
			ca.cert.NotBefore.Format(time.RFC3339), now.UTC().Format(time.RFC3339)), doClock}
	}
	if next, err = readSigner(f, nextFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil, err
	}
	if next != nil && next.cert.Equal(ca.cert) { // a hand-over was cut short before its last step
		next = nil
		if err := f.Remove(nextFile); err != nil {
			return nil, nil, nil, err
		}
	}
	if previous, err = readCert(f, previousFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil, err
	}
	return ca, next, previous, nil
}

func (s *signer) certificate() *x509.Certificate {
	if s == nil {
		return nil
	}
	return s.cert
}

// handOver makes the successor the one that signs. Ended at any point, the
// next try does the rest.
func handOver(f Files, ca, next *signer) error {
	old := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})
	if err := f.Write(previousFile, old); err != nil {
		return err
	}
	b, err := next.encode()
	if err != nil {
		return err
	}
	if err := f.Write(caFile, b); err != nil {
		return err
	}
	return f.Remove(nextFile)
}

func makeSigner(f Files, name string, now time.Time) (*signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	tmpl, err := template("procession collector", now, caLife)
	if err != nil {
		return nil, err
	}
	tmpl.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	tmpl.IsCA, tmpl.BasicConstraintsValid, tmpl.MaxPathLenZero = true, true, true
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make a certificate authority: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("make a certificate authority: %w", err)
	}
	s := &signer{cert, key}
	b, err := s.encode()
	if err != nil {
		return nil, err
	}
	return s, f.Write(name, b)
}

// encode is what parseSigner reads.
func (s *signer) encode() ([]byte, error) {
	key, err := encodeKey(s.key)
	if err != nil {
		return nil, err
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.cert.Raw}), key...), nil
}

// template is what all certificates have in common.
func template(name string, now time.Time, life time.Duration) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("make a serial number: %w", err)
	}
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    now.Add(-backdate),
		NotAfter:     now.Add(life),
	}, nil
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode a key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// readSigner reads a certificate and its key from one file.
func readSigner(f Files, name string) (*signer, error) {
	b, err := f.Read(name)
	if err != nil {
		return nil, err
	}
	s, err := parseSigner(b)
	if err != nil {
		return nil, &FileError{f.Path(name), err, doRestore}
	}
	return s, nil
}

func parseSigner(b []byte) (*signer, error) {
	cert, rest, err := parseCert(b)
	if err != nil {
		return nil, err
	}
	if !cert.IsCA {
		return nil, errors.New("the certificate is not a certificate authority's")
	}
	blk, _ := pem.Decode(rest)
	if blk == nil || blk.Type != "PRIVATE KEY" {
		return nil, errors.New("no private key in PEM behind the certificate")
	}
	k, err := x509.ParsePKCS8PrivateKey(blk.Bytes)
	if err != nil {
		return nil, fmt.Errorf("the private key cannot be read: %w", err)
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("the private key is a %T, want ECDSA", k)
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return nil, errors.New("key and certificate do not belong together")
	}
	return &signer{cert, key}, nil
}

func readCert(f Files, name string) (*x509.Certificate, error) {
	b, err := f.Read(name)
	if err != nil {
		return nil, err
	}
	c, _, err := parseCert(b)
	if err != nil {
		return nil, &FileError{f.Path(name), err, "remove it: it is only needed for agents that have not renewed"}
	}
	return c, nil
}

func parseCert(b []byte) (*x509.Certificate, []byte, error) {
	blk, rest := pem.Decode(b)
	if blk == nil || blk.Type != "CERTIFICATE" {
		return nil, nil, errors.New("no certificate in PEM")
	}
	c, err := x509.ParseCertificate(blk.Bytes)
	if err != nil {
		return nil, nil, fmt.Errorf("the certificate cannot be read: %w", err)
	}
	return c, rest, nil
}
