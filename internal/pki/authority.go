package pki

import (
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
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
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
	bundleFile   = "ca.crt"
	lockFile     = ".lock"
)

// An Authority signs certificates. Several processes may open one directory.
type Authority struct {
	dir string
	now func() time.Time

	mu        sync.Mutex
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
	a := &Authority{dir: dir, now: now}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a, a.refreshLocked(now())
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

func (a *Authority) bundleLocked() (b []byte) {
	for _, c := range a.trusted {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return b
}

// freshLocked looks at the files if the last look is long ago.
func (a *Authority) freshLocked(now time.Time) error {
	if d := now.Sub(a.refreshed); d >= 0 && d < refreshWait {
		return nil
	}
	return a.refreshLocked(now)
}

// refreshLocked reads the files, and makes what is missing or due.
func (a *Authority) refreshLocked(now time.Time) error {
	unlock, err := lock(filepath.Join(a.dir, lockFile))
	if err != nil {
		return err
	}
	defer unlock()
	ca, err := readSigner(filepath.Join(a.dir, caFile))
	if errors.Is(err, fs.ErrNotExist) {
		// ca.crt is written last. With it there, the key was lost, and to make
		// a new one silently would lock out every agent.
		if _, serr := os.Stat(filepath.Join(a.dir, bundleFile)); serr == nil {
			return &FileError{filepath.Join(a.dir, caFile), errors.New("missing, but " + bundleFile + " is there"), doRestore}
		}
		ca, err = makeSigner(filepath.Join(a.dir, caFile), now)
	}
	if err != nil {
		return err
	}
	if now.Before(ca.cert.NotBefore) {
		return &FileError{filepath.Join(a.dir, caFile), fmt.Errorf("is not valid before %s, and the clock says %s",
			ca.cert.NotBefore.Format(time.RFC3339), now.UTC().Format(time.RFC3339)), doClock}
	}
	next, err := readSigner(filepath.Join(a.dir, nextFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	previous, err := readCert(filepath.Join(a.dir, previousFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	left := ca.cert.NotAfter.Sub(now)
	if next == nil && left < caAnnounce {
		if next, err = makeSigner(filepath.Join(a.dir, nextFile), now); err != nil {
			return err
		}
	}
	if next != nil && left < caHandOver {
		known := now.Sub(next.cert.NotBefore.Add(backdate))
		// A collector that was off for long hands over as soon as agents could
		// have learned of the successor, or when there is nothing to lose.
		if known >= caAnnounce-caHandOver || left <= 0 {
			if err := a.handOver(ca, next); err != nil {
				return err
			}
			previous, ca, next = ca.cert, next, nil
		}
	}
	a.ca, a.next, a.trusted = ca, next, a.trusted[:0:0]
	for _, c := range []*x509.Certificate{ca.cert, next.certificate(), previous} {
		if c != nil && (now.Before(c.NotAfter) || c == ca.cert) {
			a.trusted = append(a.trusted, c)
		}
	}
	bundle := a.bundleLocked()
	if have, _ := os.ReadFile(filepath.Join(a.dir, bundleFile)); string(have) != string(bundle) {
		if err := writeFile(filepath.Join(a.dir, bundleFile), bundle, 0o644); err != nil {
			return err
		}
	}
	a.refreshed = now
	return nil
}

func (s *signer) certificate() *x509.Certificate {
	if s == nil {
		return nil
	}
	return s.cert
}

// handOver makes the successor the one that signs. Ended at any point, the
// next try does the rest.
func (a *Authority) handOver(ca, next *signer) error {
	old := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})
	if err := writeFile(filepath.Join(a.dir, previousFile), old, 0o644); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(a.dir, nextFile), filepath.Join(a.dir, caFile)); err != nil {
		return fmt.Errorf("hand over to the next certificate authority: %w", err)
	}
	return syncDir(a.dir)
}

func makeSigner(path string, now time.Time) (*signer, error) {
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
	keyPEM, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	b := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), keyPEM...)
	return &signer{cert, key}, writeFile(path, b, 0o600)
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
func readSigner(path string) (*signer, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	s, err := parseSigner(b)
	if err != nil {
		return nil, &FileError{path, err, doRestore}
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

func readCert(path string) (*x509.Certificate, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	c, _, err := parseCert(b)
	if err != nil {
		return nil, &FileError{path, err, "remove it: it is only needed for agents that have not renewed"}
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

// lock keeps other processes from making the same files meanwhile.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the certificate authority: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock the certificate authority: %w", err)
	}
	return func() { f.Close() }, nil
}

// writeFile writes a file whole or not at all.
func writeFile(path string, b []byte, mode fs.FileMode) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if _, err := f.Write(b); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
