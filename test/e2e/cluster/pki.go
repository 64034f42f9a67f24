package cluster

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// Certificates outlive every test and no longer: a cluster that was forgotten
// stops being one.
const certLife = 30 * 24 * time.Hour

type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

type pki struct {
	dir string
	err error
}

// write keeps the first error; later steps then do nothing.
func (p *pki) write(name string, b []byte) {
	if p.err == nil {
		p.err = os.WriteFile(filepath.Join(p.dir, name), b, 0o600)
	}
}

func (p *pki) key(name string) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err == nil {
		var der []byte
		if der, err = x509.MarshalPKCS8PrivateKey(key); err == nil {
			p.write(name, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
		}
	}
	if p.err == nil {
		p.err = err
	}
	return key
}

func (p *pki) sign(name string, tmpl, parent *x509.Certificate, pub crypto.PublicKey, by crypto.Signer) *x509.Certificate {
	if p.err != nil {
		return nil
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		p.err = err
		return nil
	}
	tmpl.SerialNumber = serial
	tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(certLife)
	tmpl.BasicConstraintsValid = true
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, by)
	if err != nil {
		p.err = fmt.Errorf("certificate %s: %w", name, err)
		return nil
	}
	p.write(name+".crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	cert, err := x509.ParseCertificate(der)
	if p.err == nil {
		p.err = err
	}
	return cert
}

func (p *pki) authority(name string) authority {
	key := p.key(name + ".key")
	tmpl := &x509.Certificate{Subject: pkix.Name{CommonName: name}, IsCA: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature}
	return authority{cert: p.sign(name, tmpl, tmpl, key.Public(), key), key: key}
}

// leaf makes a client certificate, and a server's too if it is for names.
func (p *pki) leaf(ca authority, name, commonName string, groups []string, names ...string) {
	key := p.key(name + ".key")
	tmpl := &x509.Certificate{
		Subject:     pkix.Name{CommonName: commonName, Organization: groups},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			tmpl.IPAddresses = append(tmpl.IPAddresses, ip)
		} else {
			tmpl.DNSNames = append(tmpl.DNSNames, n)
		}
	}
	if len(names) > 0 {
		tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	if p.err == nil {
		p.sign(name, tmpl, ca.cert, key.Public(), ca.key)
	}
}

// kubeconfig writes NAME.conf for the client certificate NAME.
func (p *pki) kubeconfig(name, server string) {
	data := func(file string) string {
		b, err := os.ReadFile(filepath.Join(p.dir, file))
		if p.err == nil {
			p.err = err
		}
		return base64.StdEncoding.EncodeToString(b)
	}
	p.write(name+".conf", fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, certificate-authority-data: %s}}]
users: [{name: u, user: {client-certificate-data: %s, client-key-data: %s}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
current-context: c
`, server, data("ca.crt"), data(name+".crt"), data(name+".key")))
}

// writePKI makes everything that the parts of a cluster show each other: the
// same subjects, groups and usages that kubeadm gives them.
func writePKI(dir, server, node, nodeIP, serviceIP string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	p := &pki{dir: dir}
	ca := p.authority("ca")
	front := p.authority("front-proxy-ca")
	p.leaf(front, "front-proxy-client", "front-proxy-client", nil)
	p.leaf(ca, "apiserver", "kube-apiserver", nil, "kubernetes", "kubernetes.default", "kubernetes.default.svc",
		"kubernetes.default.svc.cluster.local", "localhost", "127.0.0.1", nodeIP, serviceIP)
	p.leaf(ca, "apiserver-kubelet-client", "kube-apiserver-kubelet-client", []string{"system:masters"})
	p.leaf(ca, "kubelet-serving", "system:node:"+node, []string{"system:nodes"}, node, nodeIP, "127.0.0.1", "localhost")
	for _, c := range []struct{ name, user, group string }{
		{"admin", "kubernetes-admin", "system:masters"},
		{"kubelet", "system:node:" + node, "system:nodes"},
		{"controller-manager", "system:kube-controller-manager", ""},
		{"scheduler", "system:kube-scheduler", ""},
		{"kube-proxy", "system:kube-proxy", ""},
	} {
		var groups []string
		if c.group != "" {
			groups = []string{c.group}
		}
		p.leaf(ca, c.name, c.user, groups)
		p.kubeconfig(c.name, server)
	}
	sa := p.key("sa.key")
	if p.err != nil {
		return fmt.Errorf("certificates in %s: %w", dir, p.err)
	}
	der, err := x509.MarshalPKIXPublicKey(sa.Public())
	if err != nil {
		return err
	}
	p.write("sa.pub", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	return p.err
}
