package storetest

import (
	"database/sql"
	"errors"
	"fmt"
	"hash/fnv"
	"sync"
	"testing"

	"github.com/procession-dev/procession/internal/testenv"
	"github.com/procession-dev/procession/internal/testenv/postgres"
)

// A Server is a PostgreSQL in memory that ends with the test.
type Server struct {
	*postgres.Server
	made sync.Map // schemas
}

// StartPostgres makes and starts a server; it skips where there is none.
func StartPostgres(t testing.TB) *Server {
	t.Helper()
	pg, err := postgres.New(Dir(t))
	if errors.Is(err, postgres.ErrNone) {
		testenv.Skip(t, err.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pg.Stop)
	return &Server{Server: pg}
}

// noClock makes the functions that tell a server's time fail in a schema. A
// server's clock may be set; whoever asks it would have to be right all the same.
const noClock = `DO $do$ DECLARE f text; BEGIN
	FOREACH f IN ARRAY ARRAY['now', 'clock_timestamp', 'statement_timestamp', 'transaction_timestamp', 'timeofday'] LOOP
		EXECUTE format('CREATE FUNCTION %I() RETURNS %s LANGUAGE plpgsql AS $f$ BEGIN RAISE EXCEPTION ''the clock of the database was asked''; END $f$',
			f, CASE f WHEN 'timeofday' THEN 'text' ELSE 'timestamptz' END);
	END LOOP;
END $do$`

// Schema is the DSN of a schema named after dir, which is made the first time.
// Nothing that is done in it can ask what time it is there.
func (s *Server) Schema(t testing.TB, dir string) string {
	t.Helper()
	h := fnv.New64a()
	h.Write([]byte(dir))
	name := fmt.Sprintf("t%x", h.Sum64())
	if _, there := s.made.LoadOrStore(name, true); there {
		return s.DSN(name + ",pg_catalog")
	}
	db, err := sql.Open("pgx", s.DSN("public"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.ExecContext(t.Context(), `CREATE SCHEMA `+name+`; SET search_path=`+name+`; `+noClock); err != nil {
		t.Fatal(err)
	}
	return s.DSN(name + ",pg_catalog") // named, or it would come first
}
