package kube

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/procession-dev/procession/internal/wholefile"
)

// The file is one line, "procession-pods 1 CRC32C LENGTH", and then the pods as
// a JSON array. It is replaced as a whole, so that it is either the old or the
// new one.
const (
	fileHead  = "procession-pods 1 %08x %d\n"
	maxFile   = 32 << 20
	saveEvery = 30 * time.Second
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// save writes the list to disk if it changed, at most every saveEvery, or now.
func (p *Pods) save(now bool) {
	p.mu.Lock()
	if p.cfg.File == "" || !p.dirty || !now && time.Since(p.saved) < saveEvery {
		p.mu.Unlock()
		return
	}
	p.dirty, p.saved = false, time.Now()
	pods := p.now.Load().all()
	p.mu.Unlock()

	err := store(p.cfg.File, pods)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err == nil {
		p.stats.Saves++
		return
	}
	p.dirty = true
	p.stats.Failures["disk"]++
	if text := err.Error(); p.status.Failed["disk"] != text {
		p.status.Failed["disk"] = text
		p.cfg.Log.Warn("the list of this node's pods cannot be kept for the next start", "err", err)
	}
}

func store(file string, pods []*Pod) error {
	slices.SortFunc(pods, func(a, b *Pod) int { return strings.Compare(a.UID, b.UID) })
	body, err := json.Marshal(pods)
	if err != nil {
		return err
	}
	head := fmt.Appendf(nil, fileHead, crc32.Checksum(body, castagnoli), len(body))
	return wholefile.Replace(file, append(head, body...), 0o600)
}

// load reads what save wrote. A file that is not there is an empty list.
func load(file string, most int) ([]*Pod, error) {
	content, err := wholefile.Read(file, maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return parseFile(content, most)
}

func parseFile(content []byte, most int) ([]*Pod, error) {
	head, body, _ := bytes.Cut(content, []byte("\n"))
	var sum uint32
	var length int
	if n, err := fmt.Sscanf(string(head)+"\n", fileHead, &sum, &length); n != 2 || err != nil {
		return nil, fmt.Errorf("head: %.60q is not that of a list of pods", head)
	}
	switch {
	case length != len(body):
		return nil, fmt.Errorf("length: the head says %d bytes, there are %d", length, len(body))
	case crc32.Checksum(body, castagnoli) != sum:
		return nil, errors.New("checksum: the content was changed")
	}
	var pods []*Pod
	if err := json.Unmarshal(body, &pods); err != nil {
		return nil, fmt.Errorf("content: %w", err)
	}
	for i, p := range pods {
		if p == nil || p.UID == "" || p.Namespace == "" || p.Name == "" {
			return nil, fmt.Errorf("content: pod %d has no uid, namespace or name", i)
		}
		for _, id := range p.IDs {
			if id.Container < 0 || id.Container >= len(p.Containers) {
				return nil, fmt.Errorf("content: pod %d: id of container %d of %d", i, id.Container, len(p.Containers))
			}
		}
	}
	return pods[:min(len(pods), most)], nil
}
