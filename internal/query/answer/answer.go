// Package answer is the collector's side of package query: it tells what is
// stored, how nodes and sinks stand, sends a sink back, makes a backup.
//
// It listens on a socket in the state directory (mode 0600 in a directory of
// mode 0700): whoever can open it can read the database beside it anyway, and
// nobody else can. It has no other authentication and no port.
package answer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/present"
	"github.com/procession-dev/procession/internal/query"
	"github.com/procession-dev/procession/internal/sink"
	"github.com/procession-dev/procession/internal/store"
)

// Config configures a Server.
type Config struct {
	Cluster string
	Store   store.Store
	Queue   *store.Queue
	Sinks   []*sink.Runner

	// Backup writes the database into a new file; nil when the store has its
	// own ways (PostgreSQL).
	Backup func(ctx context.Context, file string) error
}

// A Server answers.
type Server struct {
	pb.UnimplementedQueryServiceServer
	cfg  Config
	grpc *grpc.Server
}

// New makes a Server.
func New(cfg Config) *Server {
	s := &Server{cfg: cfg, grpc: grpc.NewServer(grpc.MaxRecvMsgSize(64<<10), grpc.MaxConcurrentStreams(32))}
	pb.RegisterQueryServiceServer(s.grpc, s)
	return s
}

// Listen makes the socket in dir. A socket that is there is of a collector that
// was killed: the caller has the directory's lock.
func Listen(dir string) (net.Listener, error) {
	path := filepath.Join(dir, query.Socket)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Serve answers on l until ctx ends; what is under way then is cut off.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	defer context.AfterFunc(ctx, s.grpc.Stop)()
	return s.grpc.Serve(l)
}

// pageRecords is how much of the store is read at a time.
const pageRecords = 256

// Records implements QueryService.
func (s *Server) Records(req *pb.RecordsRequest, out grpc.ServerStreamingServer[pb.RecordsResponse]) error {
	f := sink.Filter{DryRun: req.GetDryRun(), MinSeverity: req.GetMinSeverity(), Rules: req.GetRules(), Namespaces: req.GetNamespaces()}
	for _, k := range req.GetKinds() {
		kind, ok := store.ParseKind(k)
		if !ok {
			return status.Errorf(codes.InvalidArgument, "kinds: %.32q is none", k)
		}
		f.Kinds = append(f.Kinds, kind)
	}
	if err := f.Check(); err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	// Who follows, or asks for amendments, gets them as they come. Everybody else
	// gets alerts that are amended already.
	known := amendments{}
	merge := !req.GetFollow() && !slices.Contains(f.Kinds, store.Amendment)
	match := func(r *store.Record) bool {
		if merge {
			known.apply(r)
		}
		return !(merge && sink.Within(r) == store.Amendment) && f.Match(r) && (req.GetNode() == "" || r.Node == req.GetNode())
	}
	ctx := out.Context()
	after, err := s.begin(ctx, req)
	if err != nil {
		return err
	}
	if req.GetLast() > 0 && !req.GetFollow() {
		return s.last(ctx, req, after, known, match, out)
	}
	if merge {
		head, err := s.cfg.Store.Head(ctx)
		if err == nil {
			err = s.noteAll(ctx, after, head, known)
		}
		if err != nil {
			return err
		}
	}
	var recs []store.Record
	for {
		changed := s.cfg.Queue.Changed()
		if recs, err = s.cfg.Store.Read(ctx, recs[:0], after, pageRecords); err != nil {
			return err
		}
		if len(recs) == 0 {
			if !req.GetFollow() {
				return nil
			}
			select {
			case <-changed:
			case <-time.After(time.Second): // another collector on the same store
			case <-ctx.Done():
				return ctx.Err()
			}
			continue
		}
		after = recs[len(recs)-1].Cursor
		for i := range recs {
			if match(&recs[i]) {
				if err := s.send(out, &recs[i]); err != nil {
					return err
				}
			}
		}
	}
}

// begin is the cursor a request starts behind.
func (s *Server) begin(ctx context.Context, req *pb.RecordsRequest) (int64, error) {
	if t := req.GetSince(); t != nil {
		if !t.IsValid() {
			return 0, status.Error(codes.InvalidArgument, "since: not a time")
		}
		return s.cfg.Store.CursorAt(ctx, t.AsTime())
	}
	if req.GetFollow() {
		return s.cfg.Store.Head(ctx)
	}
	return 0, nil
}

// last sends the newest records that match, with what amendments among them say.
func (s *Server) last(ctx context.Context, req *pb.RecordsRequest, from int64, known amendments, match func(*store.Record) bool, out grpc.ServerStreamingServer[pb.RecordsResponse]) error {
	if req.GetLast() > query.MaxLast {
		return status.Errorf(codes.InvalidArgument, "last: %d, limit %d; use since", req.GetLast(), query.MaxLast)
	}
	end, err := s.cfg.Store.Head(ctx)
	if err != nil {
		return err
	}
	var found []store.Record // newest first
	for step := int64(pageRecords); end > from && len(found) < int(req.GetLast()); step *= 2 {
		start := max(from, end-step)
		if err := s.noteAll(ctx, start, end, known); err != nil {
			return err
		}
		var page []store.Record
		for at := start; at < end; {
			recs, err := s.cfg.Store.Read(ctx, nil, at, pageRecords)
			if err != nil {
				return err
			}
			if len(recs) == 0 {
				break
			}
			for i := range recs {
				if at = recs[i].Cursor; at <= end && match(&recs[i]) {
					page = append(page, recs[i])
				}
			}
			if extra := len(page) - int(req.GetLast()); extra > 0 {
				page = slices.Delete(page, 0, extra)
			}
		}
		slices.Reverse(page)
		found, end = append(found, page...), start
	}
	found = found[:min(len(found), int(req.GetLast()))]
	slices.Reverse(found)
	for i := range found {
		if err := s.send(out, &found[i]); err != nil {
			return err
		}
	}
	return nil
}

func (s *Server) send(out grpc.ServerStreamingServer[pb.RecordsResponse], r *store.Record) error {
	return out.Send(&pb.RecordsResponse{
		Json: sink.AppendJSON(nil, s.cfg.Cluster, r),
		Line: sink.AppendLine(nil, present.Style{Layout: time.DateTime}, s.cfg.Cluster, r),
	})
}

// Nodes implements QueryService.
func (s *Server) Nodes(ctx context.Context, _ *pb.NodesRequest) (*pb.NodesResponse, error) {
	nodes, err := s.cfg.Store.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	out := &pb.NodesResponse{}
	for _, name := range slices.Sorted(maps.Keys(nodes)) {
		if strings.HasPrefix(name, "@") { // the collector's own
			continue
		}
		n := nodes[name]
		p := &pb.Node{Name: name, Seen: timestamppb.New(n.Seen)}
		var it pb.Item
		if n.Coverage != nil && proto.Unmarshal(n.Coverage, &it) == nil {
			p.Coverage, p.CoverageReceived = it.GetCoverage(), timestamppb.New(n.At)
		}
		if n.Flags != "" {
			p.Conditions = strings.Split(n.Flags, ",")
		}
		out.Nodes = append(out.Nodes, p)
	}
	return out, nil
}

// Sinks implements QueryService.
func (s *Server) Sinks(ctx context.Context, _ *pb.SinksRequest) (*pb.SinksResponse, error) {
	head, err := s.cfg.Store.Head(ctx)
	if err != nil {
		return nil, err
	}
	all, err := s.cfg.Store.Sinks(ctx)
	if err != nil {
		return nil, err
	}
	runners := make(map[string]*sink.Runner)
	for _, r := range s.cfg.Sinks {
		runners[r.Name()] = r
		if _, ok := all[r.Name()]; !ok {
			all[r.Name()] = store.SinkState{}
		}
	}
	out := &pb.SinksResponse{}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		p := &pb.Sink{Name: name, Dead: uint64(all[name].Dead)}
		at := all[name].Cursor
		if r := runners[name]; r != nil {
			st := r.Status()
			p.Configured, p.Running, p.Error = true, st.Running, st.Err
			if !st.Since.IsZero() {
				p.ErrorSince = timestamppb.New(st.Since)
			}
			if !st.Behind.IsZero() {
				p.BehindSince = timestamppb.New(st.Behind)
			}
			if st.Running {
				at = r.Cursor()
			}
		}
		p.Behind = uint64(max(0, head-at))
		out.Sinks = append(out.Sinks, p)
	}
	return out, nil
}

// DeadLetters implements QueryService.
func (s *Server) DeadLetters(ctx context.Context, req *pb.DeadLettersRequest) (*pb.DeadLettersResponse, error) {
	limit := int(min(max(req.GetLimit(), 1), query.MaxLast))
	dead, err := s.cfg.Store.DeadLetters(ctx, req.GetSink(), 0, limit)
	if err != nil {
		return nil, err
	}
	out := &pb.DeadLettersResponse{}
	for _, d := range dead {
		l := &pb.DeadLetter{Reason: d.Reason}
		recs, err := s.cfg.Store.Read(ctx, nil, d.Cursor-1, 1)
		if err != nil {
			return nil, err
		}
		if len(recs) == 1 && recs[0].Cursor == d.Cursor {
			l.Json = sink.AppendJSON(nil, s.cfg.Cluster, &recs[0])
		}
		out.Letters = append(out.Letters, l)
	}
	return out, nil
}

// ReplaySink implements QueryService.
func (s *Server) ReplaySink(ctx context.Context, req *pb.ReplaySinkRequest) (*pb.ReplaySinkResponse, error) {
	if req.GetFrom() == nil || !req.GetFrom().IsValid() {
		return nil, status.Error(codes.InvalidArgument, "from: not a time")
	}
	all, err := s.cfg.Store.Sinks(ctx)
	if err != nil {
		return nil, err
	}
	if _, ok := all[req.GetSink()]; !ok {
		return nil, status.Errorf(codes.NotFound, "sink: no sink %.64q; there are %s", req.GetSink(), strings.Join(slices.Sorted(maps.Keys(all)), ", "))
	}
	at, err := s.cfg.Store.CursorAt(ctx, req.GetFrom().AsTime())
	if err != nil {
		return nil, err
	}
	head, err := s.cfg.Store.Head(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := s.cfg.Queue.Do(ctx, &store.SinkReplay{Sink: req.GetSink(), Cursor: at}); err != nil {
		return nil, err
	}
	return &pb.ReplaySinkResponse{Records: uint64(max(0, head-at))}, nil
}

// Backup implements QueryService.
func (s *Server) Backup(ctx context.Context, req *pb.BackupRequest) (*pb.BackupResponse, error) {
	if s.cfg.Backup == nil {
		return nil, status.Error(codes.Unimplemented, "the store is PostgreSQL: use its own tools")
	}
	if !filepath.IsAbs(req.GetFile()) {
		return nil, status.Errorf(codes.InvalidArgument, "file: %.128q is not an absolute path", req.GetFile())
	}
	if err := s.cfg.Backup(ctx, req.GetFile()); err != nil {
		return nil, status.Error(codes.FailedPrecondition, fmt.Sprint("backup: ", err))
	}
	st, err := os.Stat(req.GetFile())
	if err != nil {
		return nil, err
	}
	return &pb.BackupResponse{Bytes: uint64(st.Size())}, nil
}
