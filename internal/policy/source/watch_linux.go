package source

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A watcher tells that something in a directory may have changed (inotify(7)).
// What it was is found by reading the directory again: the queue of events may
// overflow, and a rename looks different in every editor.
type watcher struct {
	f    *os.File
	told chan struct{}
	done chan struct{}
	wd   int
	seen inode
	gone atomic.Int32 // the last watch the kernel took back; an inode's number may be used again
}

type inode struct{ dev, ino uint64 }

// IN_CLOSE_WRITE instead of IN_MODIFY: a file that is being written is of no
// use. IN_CREATE is for links, which are never written.
const watchMask = unix.IN_CLOSE_WRITE | unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO |
	unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR

func newWatcher(dir string) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	w := &watcher{f: os.NewFile(uintptr(fd), "inotify"), told: make(chan struct{}, 1), done: make(chan struct{}), wd: -1}
	if !w.follow(dir) {
		w.f.Close()
		return nil, fmt.Errorf("inotify: %s cannot be watched", dir)
	}
	go w.read()
	return w, nil
}

// read ends when the file is closed.
func (w *watcher) read() {
	defer close(w.done)
	buf := make([]byte, 16<<10)
	for {
		n, err := w.f.Read(buf)
		if err != nil {
			return
		}
		w.ignored(buf[:n])
		select {
		case w.told <- struct{}{}:
		default: // it is told already
		}
	}
}

// ignored looks for the kernel's word that a directory is watched no longer
// (struct inotify_event, include/uapi/linux/inotify.h).
func (w *watcher) ignored(events []byte) {
	for len(events) >= unix.SizeofInotifyEvent {
		if mask := binary.NativeEndian.Uint32(events[4:]); mask&unix.IN_IGNORED != 0 {
			w.gone.Store(int32(binary.NativeEndian.Uint32(events)))
		}
		size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(events[12:]))
		if size > len(events) {
			return
		}
		events = events[size:]
	}
}

func (w *watcher) close() {
	w.f.Close()
	<-w.done
}

// changes is never ready on a nil watcher.
func (w *watcher) changes() <-chan struct{} {
	if w == nil {
		return nil
	}
	return w.told
}

// follow makes sure that it is the directory of that name that is watched,
// also when another one took its place.
func (w *watcher) follow(dir string) bool {
	if w == nil {
		return false
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return false
	}
	is := inode{uint64(st.Dev), st.Ino}
	if w.wd >= 0 && is == w.seen && int(w.gone.Load()) != w.wd {
		return true
	}
	rc, err := w.f.SyscallConn()
	if err != nil {
		return false
	}
	ok := false
	if err := rc.Control(func(fd uintptr) {
		wd, err := unix.InotifyAddWatch(int(fd), dir, watchMask)
		if err != nil {
			return
		}
		if w.wd >= 0 && w.wd != wd {
			// It fails when the old directory is gone, and the watch with it.
			_, _ = unix.InotifyRmWatch(int(fd), uint32(w.wd))
		}
		w.wd, w.seen, ok = wd, is, true
	}); err != nil {
		return false
	}
	return ok
}
